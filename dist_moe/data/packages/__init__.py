"""Sources of text that are packages of an index: one file each, and how an archive is fetched."""
