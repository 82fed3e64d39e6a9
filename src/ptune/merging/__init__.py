"""A merged model: a plain model folder whose vocabulary has the virtual tokens of soft prompts as extra rows."""
