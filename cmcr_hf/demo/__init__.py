"""Run C-MCR offline: a synthetic world of pictures, sounds and texts, and two small encoders trained on it."""
