"""What every wing may use: errors for people, paths and atomic writing, progress bars, random streams."""
