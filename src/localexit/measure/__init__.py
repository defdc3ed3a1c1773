"""Measurements of a model, a rule or this library: audits of what local training promises."""

from localexit.measure.audit import AuditReport, audit_attached, audit_model
from localexit.measure.checks import Check
from localexit.measure.locality import LocalityAudit, audit_locality
from localexit.measure.transport import TransportAudit, audit_transport

__all__ = [
    "AuditReport",
    "Check",
    "LocalityAudit",
    "TransportAudit",
    "audit_attached",
    "audit_locality",
    "audit_model",
    "audit_transport",
]
