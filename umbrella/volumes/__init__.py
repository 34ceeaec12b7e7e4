"""Reading, preprocessing and storage of volumes. Each image file is decoded once."""
