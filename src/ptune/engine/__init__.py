"""One backbone that answers by many soft prompts."""
