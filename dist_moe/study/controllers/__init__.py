"""The study of controllers: how fast and how steadily each balancing policy evens the load, without a model."""
