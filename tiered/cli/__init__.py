"""The command line: `tiered`. Commands are in `app`, what they print in `views`."""
