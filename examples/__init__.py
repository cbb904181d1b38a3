"""Programs that use fastppo; run them from the project's folder."""
