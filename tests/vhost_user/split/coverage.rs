//! Every rule has a test, and `docs/split-protocol.md` has every rule.

#[test]
fn every_rule_has_a_test_and_is_documented() {
    let source = [include_str!("rules.rs"), include_str!("lifetimes.rs")].concat();
    let documentation = include_str!("../../../docs/split-protocol.md");
    for rule in 1..=14 {
        let test = format!("#[test]\nfn rule_s{rule:02}_");
        assert!(source.contains(&test), "no test {test}");
        let row = format!("| S{rule} |");
        assert_eq!(documentation.matches(&row).count(), 1, "docs/split-protocol.md: {row}");
    }
}
