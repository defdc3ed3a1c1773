"""Measurements of a model, a rule or this library: audits of what local training promises, how good a feedback is."""

from localexit.measure.alignment import Diagnosis, Diagnostician, ExitDiagnosis, diagnose
from localexit.measure.audit import AuditReport, audit_attached, audit_model
from localexit.measure.checks import Check
from localexit.measure.locality import LocalityAudit, audit_locality
from localexit.measure.transport import TransportAudit, audit_transport

__all__ = [
    "AuditReport",
    "Check",
    "Diagnosis",
    "Diagnostician",
    "ExitDiagnosis",
    "LocalityAudit",
    "TransportAudit",
    "audit_attached",
    "audit_locality",
    "audit_model",
    "audit_transport",
    "diagnose",
]
