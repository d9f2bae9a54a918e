"""The command, `python llama3.py --prompt TEXT`: a file for each use, and what they share."""
