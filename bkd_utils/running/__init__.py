"""Run notebooks without a screen, check them and publish their outputs."""
