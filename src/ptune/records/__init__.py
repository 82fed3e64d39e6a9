"""Files and data sets to records."""
