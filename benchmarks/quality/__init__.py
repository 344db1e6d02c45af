"""AUC at equal real bytes: our method against what one could use instead."""
