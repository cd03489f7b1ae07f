"""Interface layer: what callers hold. It checks everything and knows no array library or device."""
