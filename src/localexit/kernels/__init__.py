"""The steps of an exit in Triton. Importing this needs Triton; `localexit` imports it only when it is used."""
