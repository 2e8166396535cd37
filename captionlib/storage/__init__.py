"""Files and folders on local and remote file systems."""
