"""What stands on the report: methods, data, tables; and its templates."""
