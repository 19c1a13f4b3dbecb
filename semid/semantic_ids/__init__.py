"Quantisers, codes as strings, unique IDs, and their evaluation."
