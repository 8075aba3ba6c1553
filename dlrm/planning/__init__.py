"""Plans where tables lie and foresees how long a step takes, before a rank is started or a table is made."""
