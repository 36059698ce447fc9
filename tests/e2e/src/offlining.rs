//! What the guest's kernel says while it sets memory offline.

/// Counts the reports of the kernel that a page could not be moved, or isolated,
/// just now, and returns what else there is.
///
/// Setting memory offline tries until it succeeds, and tells at a limited rate
/// what it could not move at once: a page that was just being freed, or moved, or
/// that the driver had asked a daemon to drop.
/// That is no complaint where it succeeds in the end; where it does not, the
/// memory is not given up, and that is counted.
#[must_use]
pub fn sort_out_retries<'a>(messages: impl Iterator<Item = &'a str>) -> (usize, Vec<&'a str>) {
    const BEGINS: [&str; 2] = ["migrating pfn ", "failed to isolate pfn "];
    const SUPPRESSED: &str = " callbacks suppressed";
    const DETAILS: [&str; 10] = [
        "page: refcount:",
        "head: ",
        "memcg:",
        "aops:",
        "anon flags: ",
        "flags: ",
        "page_type: ",
        "raw: ",
        "page dumped because: migration failure",
        "page dumped because: isolation failed",
    ];
    let mut retries = 0;
    let others = messages.filter(|text| {
        let begins = BEGINS.iter().any(|begins| text.starts_with(begins));
        retries += usize::from(begins);
        let limited = text.starts_with("do_migrate_range: ") && text.ends_with(SUPPRESSED);
        !begins && !limited && !DETAILS.iter().any(|detail| text.starts_with(detail))
    });
    let others = others.collect();
    (retries, others)
}

#[cfg(test)]
mod tests {
    use super::sort_out_retries;

    #[test]
    fn retries_are_told_from_complaints() {
        let messages = [
            "migrating pfn 11ba00 failed ret:4",
            "page: refcount:2 mapcount:0 mapping:0000000000000000 index:0x7 pfn:0x11ba00",
            "raw: 001fffffc0020948 ffef0104c46e0008",
            "BUG: unable to handle page fault",
            "page dumped because: migration failure",
            "do_migrate_range: 310 callbacks suppressed",
            "page dumped because: VM_BUG_ON_PAGE(1)",
        ];
        let (retries, others) = sort_out_retries(messages.into_iter());
        assert_eq!(retries, 1);
        assert_eq!(others, [messages[3], messages[6]]);
    }
}
