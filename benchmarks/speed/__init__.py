"""Speed of lookups."""
