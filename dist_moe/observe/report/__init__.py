"""Reports of runs from the files in run.dir: one page of HTML, and a comparison for the terminal."""
