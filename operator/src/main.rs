//! The operator's command line.

fn main() -> anyhow::Result<()> {
    if let Some(folder) = std::env::args().nth(1) {
        slackwater_operator::crds::write(std::path::Path::new(&folder))?;
    }
    Ok(())
}
