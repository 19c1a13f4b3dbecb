"Damage: made on purpose, measured, and found."
