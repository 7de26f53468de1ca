"""One small file for each library that lets an attention be plugged in. Importing one needs that library."""
