"""`echo-trainer quickstart`: the embedded base, its data and the run that uses them."""
