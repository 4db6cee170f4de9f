"""Models and pictures as files: the model directory, and PNGs that carry how they were made."""
