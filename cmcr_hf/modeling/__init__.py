"""Configuration, models and processor of C-MCR: the files that travel with the weights to the Hub."""
