"""Large tables and kills: what the command line takes and survives."""
