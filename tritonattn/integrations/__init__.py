"""Integrations with host libraries: torch's attention function patched, and transformers, which only its own file imports."""
