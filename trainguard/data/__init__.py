"""Reading data sets, the pixel range of a pipeline, and live views behind a loader."""
