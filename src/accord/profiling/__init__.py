"""`accord profile`: where an iteration's time goes, phase by phase, beside what its arithmetic would take at best."""
