"""report.html: one self-contained page from the files of a run; and its scores in a terminal."""
