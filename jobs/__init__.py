"""What users run: arguments in, one call out."""
