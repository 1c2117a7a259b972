"""The text of the larger migrations, one module each. Labs were made by it: it is never edited."""
