"""Tests in a real browser: reports and TensorBoard are opened by Chromium, and their charts carry data."""
