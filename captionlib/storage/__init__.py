"""Files and folders on any file system that fsspec opens."""
