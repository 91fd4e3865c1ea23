"""The structure of image files: what is read, checked and dropped before decoding."""
