"""How fast a model runs beside its rivals, and where its time and memory go."""
