"""The run record, tables and the model card. Knows plain results only, never models or weights."""
