"""Plain text in and out: numbers in words, and the readers and writers of files that people give and get."""
