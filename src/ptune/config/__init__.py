"""Settings, typed and checked, with no model and no data at hand."""
