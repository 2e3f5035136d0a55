"""Integrations: other libraries, each entered only when asked for."""
