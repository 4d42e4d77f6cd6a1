"""Pictures of the load as pixels: drawn with Pillow in milliseconds, since matplotlib would stall every run."""
