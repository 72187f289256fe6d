//! Where the settings come from that may change while a node runs: a flag wins over what was `set`, and
//! that over the settings file. What is `set` counts at once, whatever a flag says, until the next start.

use serde_json::Value;

use super::PrefsChange;

/// The settings of every source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layers {
    flags: PrefsChange,
    set: PrefsChange,
    file: PrefsChange,
    chosen: PrefsChange,
}

impl Layers {
    /// What counts at a start.
    ///
    /// # Errors
    /// They contradict each other: a sentence that says what to change.
    pub fn new(flags: PrefsChange, set: PrefsChange, file: PrefsChange) -> Result<Self, String> {
        let mut layers = Self {
            flags,
            set,
            file,
            chosen: PrefsChange::default(),
        };
        layers.chosen = layers.at_a_start();
        layers.chosen.check()?;
        Ok(layers)
    }

    fn at_a_start(&self) -> PrefsChange {
        let below = self.set.clone().over(self.file.clone());
        self.flags.clone().over(below)
    }

    /// What counts, without what nobody chose.
    pub fn chosen(&self) -> &PrefsChange {
        &self.chosen
    }

    /// What was `set`, to be remembered.
    pub fn set(&self) -> &PrefsChange {
        &self.set
    }

    /// The same with a change of what is `set`.
    ///
    /// # Errors
    /// It contradicts what else counts, or would at the next start, which could not be then.
    pub fn changed(&self, change: &PrefsChange) -> Result<Self, String> {
        let chosen = change.clone().over(self.chosen.clone());
        chosen.check()?;
        let changed = Self {
            set: change.clone().over(self.set.clone()),
            chosen,
            ..self.clone()
        };
        changed.at_a_start().check().map_err(|why| {
            let flags = changed.hidden().join(", ");
            format!(
                "the next start would fail, because the command line says another {flags}: {why}"
            )
        })?;
        Ok(changed)
    }

    /// Settings, by the names that they have in a file, of which a flag says something else than what was
    /// `set`: at the next start the flag counts.
    pub fn hidden(&self) -> Vec<String> {
        let of = |change: &PrefsChange| serde_json::to_value(change).unwrap_or_default();
        let (flags, set) = (of(&self.flags), of(&self.set));
        let set = set.as_object().into_iter().flatten();
        let differs = |name: &str, value: &Value| flags.get(name).is_some_and(|flag| flag != value);
        let hidden = set.filter(|(name, value)| differs(name, value));
        hidden.map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> PrefsChange {
        toml::from_str(text).unwrap()
    }

    fn name(text: &str) -> Option<String> {
        Some(text.into())
    }

    #[test]
    fn a_flag_wins_over_what_was_set_and_that_over_the_file() {
        let file = parse("hostname = \"file\"\nshields_up = true\naccept_routes = true");
        let set = parse("hostname = \"set\"\naccept_routes = false");
        let flags = parse("hostname = \"flag\"");
        let layers = Layers::new(flags, set, file).unwrap();
        let chosen = layers.chosen();
        assert_eq!(chosen.hostname, name("flag"));
        assert_eq!(
            (chosen.shields_up, chosen.accept_routes),
            (Some(true), Some(false))
        );
        assert_eq!(layers.hidden(), ["hostname"]);
    }

    #[test]
    fn what_is_set_counts_at_once_and_is_remembered_alone() {
        let (flags, file) = (parse("hostname = \"flag\""), parse("shields_up = true"));
        let layers = Layers::new(flags, PrefsChange::default(), file).unwrap();
        let layers = layers.changed(&parse("hostname = \"new\"")).unwrap();
        assert_eq!(layers.chosen().hostname, name("new"));
        assert_eq!(layers.chosen().shields_up, Some(true));
        assert_eq!(*layers.set(), parse("hostname = \"new\""));
        assert_eq!(layers.hidden(), ["hostname"]);
        let back = layers.changed(&parse("hostname = \"flag\"")).unwrap();
        assert!(back.hidden().is_empty());
        // As the file of it is written and read.
        let text = toml::to_string(layers.set()).unwrap();
        assert_eq!(parse(&text), *layers.set());
    }

    #[test]
    fn a_change_that_contradicts_the_rest_changes_nothing() {
        let layers = Layers::new(
            parse("advertise_exit_node = true"),
            PrefsChange::default(),
            PrefsChange::default(),
        );
        let layers = layers.unwrap();
        let change = parse("exit_node = \"b\"");
        assert!(layers.changed(&change).is_err());
        assert!(
            Layers::new(
                layers.chosen().clone(),
                change.clone(),
                PrefsChange::default()
            )
            .is_err()
        );
        // Together with a flag that is in force again at the next start.
        let layers = layers.changed(&parse("advertise_exit_node = false"));
        let refused = layers.unwrap().changed(&change).unwrap_err();
        assert!(refused.contains("another advertise_exit_node"), "{refused}");
    }
}
