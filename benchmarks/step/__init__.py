"""The full training step: several programs train at the same time in processes of their own, and take turns."""
