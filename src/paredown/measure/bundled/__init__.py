"""The files that every bundle carries: a runner for Python and the scripts that start it here, over ssh and over adb."""
