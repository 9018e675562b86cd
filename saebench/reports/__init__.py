"""One file per report; the file name is the name a suite and the command line use."""
