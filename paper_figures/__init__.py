"""The figures: one script each, drawn from recorded results; none runs a model."""
