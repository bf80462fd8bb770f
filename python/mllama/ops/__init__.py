"""The operators: public functions, each with its reference in plain torch. Importing this package registers them with torch."""
