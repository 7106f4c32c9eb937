"""From raw data to a trained connector: embed, aggregate, train."""
