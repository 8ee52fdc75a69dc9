"""What the trials of a study tell: tables, slopes, verdicts; nothing is drawn or printed here."""
